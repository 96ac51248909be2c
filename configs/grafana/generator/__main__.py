"""Writes every dashboard."""

from configs.grafana.generator.files import write

if __name__ == "__main__":
    write()
