"""Settings that come with FastFundus, each with its reasons: `fastfundus train --recipe NAME`."""
