"""The contract that device and cloud share: nothing secret, no Ray, no sockets."""
