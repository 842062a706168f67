"""Names of the dtypes that `--dtype` takes, available without torch."""

DTYPES = ("bf16", "fp16", "fp32")
