"""Writes the dashboards: `make dashboards`.

They are typed here and checked in as JSON, so that Grafana needs none of this and a review sees
what changes. Knows the names of metrics and no more of the server; needs the extra `dev`.
"""
