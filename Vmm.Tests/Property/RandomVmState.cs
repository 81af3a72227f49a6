using Vmm.Core.VmStates;

namespace Vmm.Tests.Property;

/// <summary>A random description, and owners that match it. The same seed always gives the same description.</summary>
internal sealed class RandomVmState
{
    private const int Words = 8;
    private readonly Random _random;
    private readonly List<Action<Bag, Random>> _fill = [];
    private int _names;
    private int _slots;

    public RandomVmState(int seed)
    {
        _random = new Random(seed);
        Description = Make("root", depth: 0);
    }

    public VmStateDescription<Bag> Description { get; }

    /// <summary>Creates an empty owner with the shape that the description expects.</summary>
    public Bag NewOwner() => new(_slots);

    /// <summary>Creates an owner with random content.</summary>
    public Bag NewOwner(int seed)
    {
        Bag bag = NewOwner();
        var random = new Random(seed);
        foreach (Action<Bag, Random> fill in _fill) fill(bag, random);
        return bag;
    }

    private VmStateDescription<Bag> Make(string name, int depth)
    {
        int version = _random.Next(1, 5);
        var fields = new List<VmStateField<Bag>>();
        for (int n = _random.Next(0, 7); n > 0; n--) AddField(fields, depth);
        var subs = new List<VmStateDescription<Bag>>();
        for (int n = depth < 3 ? _random.Next(0, 3) : 0; n > 0; n--) subs.Add(Make($"{name}/s{_names++}.", depth + 1));
        int needed = _slots++;
        _fill.Add((b, r) => b.Slots[needed].Count = (byte)r.Next(2));
        return new()
        {
            Name = name, VersionId = version, MinimumVersionId = _random.Next(1, version + 1), Fields = fields, Subsections = subs,
            Needed = depth == 0 ? null : b => b.Slots[needed].Count != 0,
            // A load must clear state that the stream does not contain.
            PreLoad = depth == 0 ? b => b.Clear() : b => b.Slots[needed].Count = 1,
        };
    }

    private void AddField(List<VmStateField<Bag>> fields, int depth)
    {
        int at = _slots++;
        string name = $"f{_names++}";
        Func<Bag, int, bool>? exists = _random.Next(5) == 0 ? static (_, _) => true : null;
        int num = _random.Next(1, Words);
        _fill.Add((b, r) => b.Slots[at].Fill(r));
        switch (_random.Next(depth < 3 ? 16 : 13))
        {
            case 0: fields.Add(VmState.Bool<Bag>(name, b => ref b.Slots[at].Flag, exists: exists)); break;
            case 1: fields.Add(VmState.UInt8<Bag>(name, b => ref b.Slots[at].Bytes[0], exists: exists)); break;
            case 2: fields.Add(VmState.Int16<Bag>(name, b => ref b.Slots[at].Short, exists: exists)); break;
            case 3: fields.Add(VmState.Int32<Bag>(name, b => ref b.Slots[at].Int, exists: exists)); break;
            case 4: fields.Add(VmState.UInt64<Bag>(name, b => ref b.Slots[at].Longs[0], exists: exists)); break;
            case 5: fields.Add(VmState.Timer<Bag>(name, b => ref b.Slots[at].Expiry, exists: exists)); break;
            case 6: fields.Add(VmState.Buffer<Bag>(name, num, b => b.Slots[at].Bytes.AsSpan(0, num), exists: exists)); break;
            case 7: fields.Add(VmState.Array<Bag, ulong>(name, VmStateTypes.UInt64, num, b => b.Slots[at].Longs, exists: exists)); break;
            case 8: fields.Add(VmState.Unused<Bag>(num * 700)); break;
            case 9:
                fields.Add(VmState.UInt8<Bag>($"{name}.n", b => ref b.Slots[at].Count));
                fields.Add(VmState.VarArray<Bag, ulong>(name, VmStateTypes.UInt64, b => b.Slots[at].Count, b => b.Slots[at].Longs, exists: exists));
                break;
            case 10:
                fields.Add(VmState.UInt8<Bag>($"{name}.n", b => ref b.Slots[at].Count));
                fields.Add(VmState.VBufferAlloc<Bag>(name, b => b.Slots[at].Count, Words, b => ref b.Slots[at].Bytes, exists: exists));
                break;
            case 11:
                fields.Add(VmState.UInt8<Bag>($"{name}.n", b => ref b.Slots[at].Count));
                fields.Add(VmState.Bitmap<Bag>(name, b => b.Slots[at].Count * 40L, b => b.Slots[at].Longs, exists: exists));
                break;
            case 12: fields.Add(VmState.QTailQ<Bag, Slot>(name, Slot.Description, b => b.Slots[at].List, static _ => new Slot(), Words, since: 1, exists: exists)); break;
            case 13: fields.Add(VmState.Struct<Bag, Bag>(name, Make($"t{_names++}.", depth + 1), static b => b, exists: exists)); break;
            case 14: fields.Add(VmState.StructArray<Bag, Slot>(name, Slot.Description, num, b => b.Slots[at].Children, exists: exists)); break;
            default: fields.Add(VmState.PointerArray<Bag, Slot>(name, Slot.Description, num, b => [.. b.Slots[at].Children.Select((c, i) => (at + i) % 3 == 0 ? null : c)], exists: exists)); break;
        }
    }

    internal sealed class Bag(int slots)
    {
        public Slot[] Slots { get; } = [.. Enumerable.Range(0, slots).Select(static _ => new Slot(true))];

        public void Clear()
        {
            foreach (Slot slot in Slots) slot.Clear();
        }
    }

    internal sealed class Slot(bool hasChildren = false)
    {
        public static readonly VmStateDescription<Slot> Description = new()
        {
            Name = "slot",
            Fields = [VmState.Bool<Slot>("flag", static s => ref s.Flag), VmState.Int32<Slot>("int", static s => ref s.Int)],
            Subsections = [new() { Name = "slot/short", Needed = static s => s.Flag, Fields = [VmState.Int16<Slot>("short", static s => ref s.Short)] }],
        };

        public bool Flag;
        public byte Count;
        public short Short;
        public int Int;
        public long Expiry = -1;
        public byte[] Bytes = new byte[Words];
        public ulong[] Longs = new ulong[Words];
        public List<Slot> List = [];
        public Slot[] Children = hasChildren ? [.. Enumerable.Range(0, Words).Select(static _ => new Slot())] : [];

        public void Fill(Random r)
        {
            Flag = r.Next(2) == 0;
            Count = (byte)r.Next(Words + 1);
            Short = (short)r.Next();
            Int = r.Next(int.MinValue, int.MaxValue);
            Expiry = r.Next(3) == 0 ? -1 : r.NextInt64(long.MaxValue);
            r.NextBytes(Bytes);
            for (int i = 0; i < Words; i++) Longs[i] = (ulong)r.NextInt64(long.MinValue, long.MaxValue);
            foreach (Slot child in Children) child.Fill(r);
            if (Children.Length > 0) List = [.. Enumerable.Range(0, r.Next(4)).Select(_ => { var s = new Slot(); s.Fill(r); return s; })];
        }

        public void Clear()
        {
            (Flag, Count, Short, Int, Expiry) = (false, 0, 0, 0, -1);
            Bytes = new byte[Words];
            Array.Clear(Longs);
            List.Clear();
            foreach (Slot child in Children) child.Clear();
        }
    }
}
