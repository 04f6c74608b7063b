"""Compressed models on disk: safetensors and a plan in JSON, no pickle."""
