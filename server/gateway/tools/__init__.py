"""Tool calls: what models are told of tools, and how their calls are found in what they write."""
