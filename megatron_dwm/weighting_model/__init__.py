"""The separate transformer of `--dwm-form model`."""
