"""The profile of one device."""
