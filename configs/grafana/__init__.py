"""Grafana's dashboards, how it finds them, and the program that writes them."""
