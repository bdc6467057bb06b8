"""Operate it: command line, local cluster, doctor."""
