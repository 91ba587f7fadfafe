"""chela-plugin: one string decides which token mixer sits in every block. Importing this file imports no torch."""
