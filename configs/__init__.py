"""Configuration shipped with the package: defaults, tiers, Prometheus and Grafana provisioning."""
