"""The thin module behind the notebooks: distilling DUSt3R into small students, one scene at a time."""
