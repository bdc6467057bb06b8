"""Watching a cluster: Prometheus with its rules, Grafana, the live page."""
