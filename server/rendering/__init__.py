"""Renders chat templates where they do no harm: in processes that can be killed."""
