"""The meta loss's gradient through an optimizer's step: one rule per optimizer."""
