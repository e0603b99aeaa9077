"""What is wrong with this machine, or with the hosts of a job."""
