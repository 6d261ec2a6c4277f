"""The Ray on this machine: what it may use, who starts it, and who keeps it up. Loads no Ray."""
