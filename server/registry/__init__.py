"""What survives a restart: models, scans, tunings and jobs in SQL."""
