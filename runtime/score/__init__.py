"""How likely given answers are: which tokens they are in their context, and the steps that say it."""
