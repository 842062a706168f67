"""The step log: each step's weights, the sinks they are written to, and reports on them."""
