using Vmm.Core.Cpr;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Devices.Vfio.Kernel;

/// <summary>Hands the device's descriptors to another process while its DMA goes on (vfio-migration 7.5, 7.6).</summary>
internal sealed partial class KernelVfioDeviceIo : IVfioCprIo
{
    private IDisposable? _entered;

    /// <summary>True while the device still belongs to another process; requests that would change it are then not sent to the kernel.</summary>
    internal bool IsArriving { get; init; }

    private bool _arrived;

    private bool IsUntouchable => IsArriving && !_arrived;

    /// <inheritdoc/>
    /// <remarks>The reasons are those of vfio-migration 7.5.</remarks>
    public string? CprBlockedReason =>
        IsMediated ? "it is a mediated device: its emulated IOMMU cannot suspend the addresses of guest memory"
        : Container is IommufdContainer iommufd ? iommufd.CprBlockedReason
        : Type1!.CprBlockedReason;

    /// <summary>A mediated device.</summary>
    internal bool IsMediated { get; init; }

    /// <inheritdoc/>
    public bool AnswersProbes => !IsUntouchable;

    private Type1Container? Type1 => Container as Type1Container;

    /// <inheritdoc/>
    public void EnterCpr(CprFdTable table, string id) => _entered = table.Save(Name, 0, _fd);

    /// <inheritdoc/>
    public void SuspendCpr() => Type1!.SuspendAddresses();

    /// <inheritdoc/>
    public void LoadCpr() => Type1!.TakeAddresses();

    /// <inheritdoc/>
    public void ResumeCpr()
    {
        if (!IsUntouchable)
        {
            Type1!.TakeAddresses();
            return;
        }
        _arrived = true;
        Type1!.Arrived();
    }

    /// <inheritdoc/>
    public void HandOverCpr() => Type1!.HandOver();
}
