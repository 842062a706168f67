"""Names of the dtypes that `--dtype` takes, known without torch."""

DTYPES = ("bf16", "fp16", "fp32")
