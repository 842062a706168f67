"""How samples are weighted: one file per family of policies, all on the interface of `base`."""
