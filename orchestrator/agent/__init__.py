"""The node agent: what runs, watches, stops and looks after the ranks of one node."""
