"""How samples are weighted: one file per family of policies, all with the interface of `base`."""
