"""Placeholder until attn_layer lands."""
