"""The meta loss's gradient through an optimizer's step: a rule an optimizer."""
