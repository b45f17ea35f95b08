package bus

// Queue is a first-in-first-out queue in a slice that is used again. An empty one keeps
// the memory of keptCapacity elements at most. The zero Queue is empty. Not safe for
// concurrent use.
type Queue[T any] struct {
	items []T
	head  int // items before it have left
}

// keptCapacity is how many elements an empty queue has room for: a connection that
// rests keeps little, one that is busy does not allocate for each burst.
const keptCapacity = 8

// Len is the number of elements.
func (q *Queue[T]) Len() int { return len(q.items) - q.head }

// At is the i-th element from the front.
func (q *Queue[T]) At(i int) *T { return &q.items[q.head+i] }

// Push adds the last element.
func (q *Queue[T]) Push(v T) {
	if len(q.items) == cap(q.items) && q.head > len(q.items)/2 { // moves each element once, amortized
		n := copy(q.items, q.items[q.head:])
		clear(q.items[n:])
		q.items, q.head = q.items[:n], 0
	}
	q.items = append(q.items, v)
}

// Pop removes the first element, which exists.
func (q *Queue[T]) Pop() T {
	v, zero := q.items[q.head], *new(T)
	q.items[q.head] = zero
	if q.head++; q.head == len(q.items) {
		q.reset()
	}
	return v
}

// Truncate keeps the first n elements.
func (q *Queue[T]) Truncate(n int) {
	clear(q.items[q.head+n:])
	if q.items = q.items[:q.head+n]; n == 0 {
		q.reset()
	}
}

// reset makes an empty queue forget its past.
func (q *Queue[T]) reset() {
	if q.items, q.head = q.items[:0], 0; cap(q.items) > keptCapacity {
		q.items = nil
	}
}
