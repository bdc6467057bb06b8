"""Prometheus for a cluster: configurations, rules, alerts, and `datamix monitor`."""
