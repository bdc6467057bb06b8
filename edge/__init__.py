"""The device: everything secret lives here, and only here."""
