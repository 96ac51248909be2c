"""The one Prometheus registry."""
