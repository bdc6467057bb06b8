"""The privacy audit: attacks on what crossed the wire, each beside what no observation reaches.

    observation   what one operator sees: messages, public weights, public data
    attack        what an attack is and what it may claim
    attacks/      one file for each; registered by its name
    capture       records what crosses the wire, and keeps the truth apart
    scoring       claims against the truth, with floors and intervals
    audit         runs a suite within a budget
    page          the report

An attack gets an :class:`~edge.audit.observation.Observation` and nothing else.
"""
