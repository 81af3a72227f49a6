using Vmm.Core.VmStates;

namespace Vmm.Core.Devices;

/// <summary>A FIFO of bytes for devices (QEMU: <c>Fifo8</c>). One thread at a time.</summary>
/// <param name="capacity">Largest number of bytes that it holds.</param>
internal sealed class Fifo8(int capacity)
{
    /// <summary>The whole ring and its head (QEMU: <c>vmstate_fifo8</c>).</summary>
    public static VmStateDescription<Fifo8> Description { get; } = new()
    {
        Name = "Fifo8",
        Fields =
        [
            VmState.VBuffer<Fifo8>("data", static f => f._data.Length, static f => f._data, since: 1),
            VmState.UInt32<Fifo8>("head", static f => ref f._head),
            VmState.UInt32<Fifo8>("num", static f => ref f._num),
        ],
        PostLoad = static (f, _) =>
        {
            if (f._head >= f._data.Length || f._num > f._data.Length)
                throw new InvalidDataException($"expected head below and num up to {f._data.Length}, found head {f._head} and num {f._num}");
        },
    };

    private readonly byte[] _data = new byte[capacity];
    private uint _head;
    private uint _num;

    /// <summary>Number of bytes in the FIFO.</summary>
    public int Count => (int)_num;

    /// <summary>True if the FIFO has no byte.</summary>
    public bool IsEmpty => _num == 0;

    /// <summary>True if the FIFO has no room.</summary>
    public bool IsFull => _num == _data.Length;

    /// <summary>Adds a byte at the end.</summary>
    /// <exception cref="InvalidOperationException">The FIFO is full.</exception>
    public void Push(byte value)
    {
        if (IsFull) throw new InvalidOperationException("the FIFO is full");
        _data[(_head + _num) % _data.Length] = value;
        _num++;
    }

    /// <summary>Removes and returns the first byte.</summary>
    /// <exception cref="InvalidOperationException">The FIFO is empty.</exception>
    public byte Pop()
    {
        if (IsEmpty) throw new InvalidOperationException("the FIFO is empty");
        byte value = _data[_head];
        _head = (uint)((_head + 1) % _data.Length);
        _num--;
        return value;
    }

    /// <summary>Removes all bytes.</summary>
    public void Reset()
    {
        _head = _num = 0;
        Array.Clear(_data);
    }
}
