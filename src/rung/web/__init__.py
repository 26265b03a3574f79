"""What every web application of Rung needs: who may ask, and how much."""
