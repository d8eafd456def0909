"""A module for each family of models that is built here; each ends in an `Architecture`, and needs no other entry."""
