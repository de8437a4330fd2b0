"""Where a folder's captions stand: files beside pictures, tables, and how their names are meant."""
