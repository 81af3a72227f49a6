using Vmm.Core.Memory;
using Vmm.Core.RunStates;

namespace Vmm.Tests.Support;

/// <summary>A minimal guest: it writes random pages of the first block while the VM runs. It no longer writes once the stop returns.</summary>
internal sealed class BackgroundWriter : IVmStateHandler, IDisposable
{
    private readonly TestVm _vm;
    private readonly IDisposable _registration;
    private readonly Lock _gate = new();
    private readonly Task _thread;
    private bool _running;
    private volatile bool _ended;
    private long _writes;

    internal BackgroundWriter(TestVm vm)
    {
        _vm = vm;
        _running = vm.Vm.RunState.IsRunning;
        _registration = vm.Vm.RunState.Register(this);
        _thread = Core.Threading.WorkerThread.Run("test/writer", Run);
    }

    internal long Writes => Interlocked.Read(ref _writes);

    public void OnVmStateChange(bool running, RunState state)
    {
        lock (_gate) _running = running;
    }

    public void Dispose()
    {
        _ended = true;
        _thread.Wait();
        _registration.Dispose();
    }

    private void Run()
    {
        var random = new Random(99);
        RamBlock ram = _vm.Ram;
        // Leave the last quarter alone, so that zero pages remain however long the writer runs.
        long pages = ram.PageCount * 3 / 4;
        while (!_ended)
        {
            lock (_gate)
            {
                if (_running)
                {
                    ulong at = (ulong)random.NextInt64(pages) * RamBlock.PageSize;
                    random.NextBytes(ram.Slice(at, 512));
                    ram.MarkDirty(at, 512);
                    Interlocked.Increment(ref _writes);
                }
            }
            Thread.Yield();
        }
    }
}
