"""What happened to each request, as spans for a collector of OpenTelemetry's; knows no model."""
