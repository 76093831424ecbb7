"""Tools of the repository that tests import; not part of the distribution."""
