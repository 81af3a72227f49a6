using BenchmarkDotNet.Attributes;
using Vmm.Core.Buffers;
using Vmm.Core.Channels;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;
using Vmm.Core.Wire;

namespace Vmm.Tools.Bench.Micro;

/// <summary>The codec of device state: a device of four numbers, an array and a buffer, saved and loaded a thousand times. One operation is one device.</summary>
public class CodecBench
{
    private const int Devices = 1000;
    private readonly IVmStateSection _section = s_description.Bind(new Device());
    private byte[] _saved = [];

    private static readonly VmStateDescription<Device> s_description = new()
    {
        Name = "bench", VersionId = 1, MinimumVersionId = 1,
        Fields =
        [
            VmState.UInt8<Device>("mode", static d => ref d.Mode), VmState.Bool<Device>("enabled", static d => ref d.IsEnabled),
            VmState.UInt32<Device>("control", static d => ref d.Control), VmState.UInt64<Device>("address", static d => ref d.Address),
            VmState.Array<Device, uint>("registers", VmStateTypes.UInt32, 32, static d => d.Registers), VmState.Buffer<Device>("queue", 64, static d => d.Queue),
        ],
    };

    [GlobalSetup]
    public void Setup()
    {
        using var channel = new Sink();
        SaveTo(channel);
        _saved = channel.Bytes.ToArray();
    }

    [Benchmark(OperationsPerInvoke = Devices)]
    public void Save()
    {
        using var channel = new Sink();
        SaveTo(channel);
    }

    [Benchmark(OperationsPerInvoke = Devices)]
    public void Load()
    {
        using var channel = new Sink(_saved);
        var reader = new QemuFileReader(channel);
        for (int i = 0; i < Devices; i++) _section.Load(reader, 1);
    }

    private void SaveTo(Sink channel)
    {
        using var writer = new QemuFileWriter(channel);
        for (int i = 0; i < Devices; i++) _section.Save(writer);
        writer.Flush();
    }

    private sealed class Device
    {
        internal byte Mode = 3;
        internal bool IsEnabled = true;
        internal uint Control = 0x1234;
        internal ulong Address = 0xfee00000;
        internal readonly uint[] Registers = new uint[32];
        internal readonly byte[] Queue = new byte[64];
    }

    /// <summary>A channel in memory.</summary>
    private sealed class Sink(byte[]? input = null) : IMigrationChannel
    {
        private int _at;

        internal MemoryStream Bytes { get; } = new();

        public string Name => "memory";

        public bool IsBidirectional => false;

        public bool PeerHasClosed => false;

        public int Read(Span<byte> destination)
        {
            int n = Math.Min(destination.Length, (input?.Length ?? 0) - _at);
            input.AsSpan(_at, n).CopyTo(destination);
            _at += n;
            return n;
        }

        public void Write(ReadOnlySpan<byte> source) => Bytes.Write(source);

        public void WriteGather(GatherList parts)
        {
            for (int i = 0; i < parts.Count; i++) Bytes.Write(parts.Segment(i));
            parts.Clear();
        }

        public void Shutdown(ChannelShutdown how)
        {
            // Nobody waits in it.
        }

        public bool Drain(TimeSpan timeout) => true;

        public void Dispose() => Bytes.Dispose();
    }
}
