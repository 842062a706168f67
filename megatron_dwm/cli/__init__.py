"""The command `megatron-dwm`: one thin module for each of its commands.

What a module imports at its top is light: help and completion need neither torch nor Megatron.
"""
