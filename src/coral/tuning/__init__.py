"""Which draft tree is fastest here: acceptance from recorded texts, costs from the clock."""
