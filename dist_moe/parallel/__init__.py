"""Ranks: the launcher, MPI, the world of ranks, how a job ends, and the exchanges. The only importer of mpi4py."""
