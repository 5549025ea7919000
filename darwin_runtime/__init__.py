"""Everything that the roles are made of. A room imports only from floors below its own: `tests/test_house.py`."""
