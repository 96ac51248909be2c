"""The bodies of requests: fields, types and bounds. Token ids are bounded later."""
