"""HTTP: OpenAI routes, model management, probes. Imports neither torch nor transformers."""
