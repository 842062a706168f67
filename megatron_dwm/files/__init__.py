"""Files of others, read with care; folders, replaced whole."""
