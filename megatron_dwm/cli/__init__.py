"""The command `megatron-dwm`: one thin module for each of its commands.

Modules import only light packages at their top: help and completion need neither torch nor
Megatron.
"""
