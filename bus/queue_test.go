package bus

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// A Queue is a slice to which elements are added behind and taken in front.
func TestQueue_Model(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var q Queue[int]
		var want []int
		next := 0
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			default:
				for range rapid.IntRange(1, 20).Draw(t, "pushed") {
					q.Push(next)
					want = append(want, next)
					next++
				}
			case 4, 5, 6, 7, 8:
				for range rapid.IntRange(0, min(20, len(want))).Draw(t, "popped") {
					if got := q.Pop(); got != want[0] {
						t.Fatalf("Pop = %d, want %d", got, want[0])
					}
					want = want[1:]
				}
			case 9:
				n := rapid.IntRange(0, len(want)).Draw(t, "kept")
				q.Truncate(n)
				want = want[:n]
			}
			var got []int
			for i := range q.Len() {
				got = append(got, *q.At(i))
			}
			if !slices.Equal(got, want) {
				t.Fatalf("queue %v, want %v", got, want)
			}
			if len(want) == 0 && cap(q.items) > keptCapacity {
				t.Fatalf("an empty queue keeps room for %d elements, want %d at most", cap(q.items), keptCapacity)
			}
			if kept := slices.ContainsFunc(q.items[:q.head], func(v int) bool { return v != 0 }); kept {
				t.Fatalf("an element that has left is still there: %v", q.items[:q.head])
			}
		}
	})
}

// A queue that is never empty does not grow, and does not allocate.
func TestQueue_SteadyFlow_DoesNotAllocate(t *testing.T) {
	var q Queue[int]
	for i := range 100 {
		q.Push(i)
	}
	step := func() {
		q.Push(1)
		q.Pop()
	}
	for range 1000 {
		step()
	}
	if n := testing.AllocsPerRun(1000, step); n > 0 {
		t.Errorf("%v allocations an element, want none", n)
	}
	if cap(q.items) > 512 {
		t.Errorf("100 elements take room for %d", cap(q.items))
	}
}
