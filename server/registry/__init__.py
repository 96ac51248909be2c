"""What survives a restart: models, scans and jobs in SQL."""
