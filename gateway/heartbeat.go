package gateway

import "time"

// One goroutine pings all connections. It wakes heartbeatSlots times in a PingInterval,
// and each time pings the connections of one slot, looks for the pongs to an earlier
// slot's pings, and closes those of a third that are overdue. So no connection has a
// timer or a goroutine for it.

// beat is the ping of a connection that the heartbeat waits for.
type beat struct {
	ping   uint64 // its number; 0: none
	tick   int    // when it was asked for
	late   bool   // PongTimeout has passed
	stalls uint64 // of the connection, then
}

// heartbeatLoop ends with the last connection.
func (g *Gateway) heartbeatLoop() {
	period := g.cfg.PingInterval / heartbeatSlots
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	// From a ping to the end of its time-out, and to when its pong is late.
	end := max(thawTicks+1, int((g.cfg.PongTimeout+period-1)/period))
	late := end - thawTicks
	var conns []*conn // used again
	for tick := 0; ; {
		select {
		case <-ticker.C:
			tick++
			for _, c := range g.slot(&conns, tick-end) {
				c.endBeat(tick - end)
			}
			for _, c := range g.slot(&conns, tick-late) {
				c.missBeat(tick - late)
			}
			for _, c := range g.slot(&conns, tick) {
				c.askBeat(tick)
			}
			clear(conns[:cap(conns)])
		case <-g.emptied:
		}
		g.mu.Lock()
		g.beating = g.open > 0
		more := g.beating
		g.mu.Unlock()
		if !more {
			return
		}
	}
}

// slot lists the connections that are pinged at tick, in conns.
func (g *Gateway) slot(conns *[]*conn, tick int) []*conn {
	if tick < 0 {
		return nil
	}
	*conns = (*conns)[:0]
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.slots[tick%heartbeatSlots] {
		*conns = append(*conns, c)
	}
	return *conns
}

// askBeat pings the peer. If an earlier ping is still waited for, its time-out stays.
func (c *conn) askBeat(tick int) {
	ping := c.out.control.ask()
	c.out.beat()
	if c.beat.ping == 0 || c.out.control.answeredTo(c.beat.ping) {
		c.beat = beat{ping: ping, tick: tick, stalls: c.stalls.Load()}
	}
}

// missBeat notes that the pong to the ping of tick is late. If the whole process was
// stopped meanwhile, it is in the socket: there is some time to read it.
func (c *conn) missBeat(tick int) {
	c.beat.late = c.beat.ping != 0 && c.beat.tick == tick
}

// endBeat closes the connection if the pong has not come. If the relay itself stopped
// reading meanwhile, the pong may wait behind frames that nobody has read: then the
// next heartbeat tells.
func (c *conn) endBeat(tick int) {
	if !c.beat.late || c.beat.tick != tick {
		return
	}
	b := c.beat
	c.beat = beat{}
	if !c.out.control.answeredTo(b.ping) && !c.handling.Load() && c.stalls.Load() == b.stalls {
		c.closeAs(codeHeartbeat)
	}
}
