"""Entry points of Cacher and the place where its parts are put together."""
