"""Save and load compressed models as safetensors files with a plan in JSON, without pickle."""
